"""Composes the command line and YAML files into a typed `Run`: schema, flags, presets, composition, prompts."""
