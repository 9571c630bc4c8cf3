"""From the command line and YAML files to a typed run: schema, flags, presets, composition, multirun."""
