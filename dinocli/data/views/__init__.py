"""Views: from pixels to the crops, augmentations and masks that a method trains on."""
