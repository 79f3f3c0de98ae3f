"""DINO self-supervised pretraining for anyone with a folder of images.

The shapes in this package, written at the end of the line that makes a tensor:

    V  views (crops) of an image        B  images in a batch
    G  global crops among the views     C  image channels
    H  height    W  width               N  patch tokens of an image
    D  width of the backbone            R  register tokens
    K  prototypes of a head             S  samples in a feature file
"""

__version__ = "0.1.0"
