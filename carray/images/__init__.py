"""From an image file's bytes to pixels, and from a class name to make, model and year."""
