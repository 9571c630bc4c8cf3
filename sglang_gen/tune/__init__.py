"""`sglang tune`: the fastest configuration whose images stay close to those of the exact run."""
