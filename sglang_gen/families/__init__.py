"""Model families of the native engine: text encoding, schedule, latents, decoding, and tables for sharding."""
