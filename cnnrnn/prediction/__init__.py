"""From images to label sets."""
