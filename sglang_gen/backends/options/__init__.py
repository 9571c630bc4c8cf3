"""What the diffusers backend does to a built pipeline, one option group a file. Each reads back what took effect."""
