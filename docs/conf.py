"""How Sphinx builds these pages; ./dev test builds them with warnings as errors."""

import tomllib
from pathlib import Path

_pyproject = Path(__file__).parent.parent / "pyproject.toml"

project = "shmsession"
author = "shmsession contributors"
copyright = "2026, shmsession contributors"
release = version = tomllib.loads(_pyproject.read_text(encoding="utf-8"))["project"]["version"]

extensions = ["myst_parser"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"shmsession {version}"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
