"""Creates the embedded model `landscape`: training images and captions, training, export and evaluation."""
