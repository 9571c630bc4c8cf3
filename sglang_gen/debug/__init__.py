"""`sglang debug`: compares the native engine with diffusers to find the first module that differs."""
