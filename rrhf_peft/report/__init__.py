"""Folders of training, evaluation and rounds in, one HTML file that needs nothing else out."""
