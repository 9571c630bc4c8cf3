"""The JavaScript of Vega-Lite, from the package vl-convert-python, in the version that Altair writes plots for."""

import importlib.util

from sglang_gen import env, files, log
from sglang_gen.errors import in_our_words

PACKAGES_OF_EXTRA = {"altair": "altair", "vl_convert": "vl-convert-python", "jinja2": "jinja2"}
INSTALL = "pip install 'sglang-gen[report]'"


def missing() -> list[str]:
    """Names of the packages of the extra `report` that are not installed."""
    return [name for module, name in PACKAGES_OF_EXTRA.items() if importlib.util.find_spec(module) is None]


def bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script without imports, about 0.9 MB, which defines `vegaEmbed`.

    Bundling takes seconds, so the script is kept in the cache folder.
    """
    import altair
    import vl_convert

    version, known = ".".join(altair.SCHEMA_VERSION.lstrip("v").split(".")[:2]), vl_convert.get_vegalite_versions()
    if version not in known:  # Altair is newer
        version = known[-1]
    name = f"vega-lite-{version}-{vl_convert.__version__}.js"  # type: ignore[attr-defined]
    path = env.cache_dir() / "report" / name
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeError):
        script: str = vl_convert.javascript_bundle(vl_version=version)  # type: ignore[call-arg]  # its stub makes an optional argument required
    try:
        files.write_bytes(path, script.encode())
    except OSError as error:
        log.debug(f"{path} cannot be written: {in_our_words(error)}")
    return script
