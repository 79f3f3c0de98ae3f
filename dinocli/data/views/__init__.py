"""Views: crops, augmentation and masks that a method trains on."""
