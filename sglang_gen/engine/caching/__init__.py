"""Step caches: denoising steps that reuse what blocks computed in an earlier step."""
