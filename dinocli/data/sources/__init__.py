"""Sources of images: folders, lists, tar shards, torchvision data sets, videos and single photos."""
