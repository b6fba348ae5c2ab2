"""
Write the map in CONTRIBUTING.md: the packages in the order in which they may import each other,
and the first sentence of each module.

Run it after a module is added or renamed: `python docs/make_map.py`. A test says when it is old.
"""

import ast
import textwrap
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "eaft"
PAGE = ROOT / "CONTRIBUTING.md"
BEGIN, END = "<!-- map: docs/make_map.py -->\n", "<!-- end of the map -->\n"
INDENT = 26


def sentence(file: Path) -> str:
    """Return the first sentence of a module's docstring, as one line."""
    docstring = ast.get_docstring(ast.parse(file.read_text())) or ""
    return " ".join(docstring.split("\n\n")[0].split())


def entry(name: str, text: str, depth: int) -> str:
    """Return a name and its sentence as indented lines of at most 100 columns."""
    start = "    " + "  " * depth + name
    return textwrap.fill(
        text,
        100,
        initial_indent=start.ljust(INDENT - 1) + " ",
        subsequent_indent=" " * INDENT,
        break_on_hyphens=False,
        break_long_words=False,
    )


def entries(folder: Path, depth: int) -> list[str]:
    """Return the lines of a package, then the lines of its modules and packages, by name."""
    lines = [entry(f"{folder.name}/", sentence(folder / "__init__.py"), depth - 1)]
    for path in sorted(folder.iterdir()):
        if (path / "__init__.py").is_file():
            lines += entries(path, depth + 1)
        elif path.suffix == ".py" and not path.name.startswith("__"):
            lines.append(entry(path.stem, sentence(path), depth))
    return lines


def make_map() -> str:
    """Return the map as Markdown: the layers of pyproject.toml, from the last to the first."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = next(c["layers"] for c in settings["contracts"] if c.get("containers") == ["eaft"])
    lines: list[str] = []
    for layer in reversed(layers):
        for name in layer.split(" | "):
            if (package := SOURCE / name).is_dir():
                lines += ["", *entries(package, 1)]
            elif name != "__main__":
                lines.append(entry(name, sentence(SOURCE / f"{name}.py"), 0))
    return "\n".join(lines).lstrip("\n") + "\n"


def main() -> None:
    """Put the map between its marks."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(before + BEGIN + "\n" + make_map() + "\n" + END + after)


if __name__ == "__main__":
    main()
