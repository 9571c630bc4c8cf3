"""How a request that nobody should make must end."""

import re

# What reaches a user from a library: the name of an exception class, or of a module of the library.
FOREIGN = re.compile(
    r"Traceback|\b[A-Z]\w*(?:Error|Exception)\b|\b(?:torch|diffusers|transformers|omegaconf|safetensors)\.(?!yaml|json)[a-z_]+"
    r"|\bhydra\.(?:core|errors|plugins|types|utils|_internal)"
)


def ran_into(code: int, lines: list[str], err: str) -> str | None:
    """What is wrong with the end of a request; None if nothing is."""
    errors = [line for line in lines if line.startswith("ERROR: ")]
    if code not in (0, 2):
        return f"exit code {code}"
    if (code == 2) != (len(errors) == 1):
        return f"{len(errors)} errors"
    if any(not re.match(r"(INFO|WARNING|ERROR): ", line) for line in lines if line):
        return "a line that is no log line"
    if found := FOREIGN.search("\n".join(errors)):
        return f"'{found.group()}' reached the user"
    return "an escape code" if "\x1b" in err else None
