"""Everything that makes the embedded model `landscape`: its pictures, captions, training and evaluation."""
