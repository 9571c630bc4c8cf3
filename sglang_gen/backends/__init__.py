"""The engines: each turns a plan into something with `sample(batch, steps, clock)`."""
