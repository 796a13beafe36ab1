"""What is in an image: data sets that yield `Scene` items and know nothing of models."""
