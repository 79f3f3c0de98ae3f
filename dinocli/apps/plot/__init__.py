"""Plot: features in two dimensions, as a picture and as a page."""
