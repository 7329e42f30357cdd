"""Brings the graph library of the HTML page into a build. It is not kept in the repository.

The library is cytoscape.js (MIT). The package index has it inside the widget package ipycytoscape,
as one piece of a bundle: modules by number, in a global array. What is put behind it hands them
out, so that the piece can be used by itself.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE = "ipycytoscape==1.3.3"
LIBRARY = "cytoscape"
BUNDLE = "ipycytoscape/labextension/static"
PIECE = "58.6846eb7cf4206803b3ab.js"
SHA256 = "a9c377163564a8a26f9608c368f1cd3206875966f24202df6603e6879b59a33d"

LOADER = """
(() => {
  const pieces = self.webpackChunkjupyter_cytoscape;
  const modules = Object.assign({}, ...pieces.map((piece) => piece[1]));
  const loaded = {};
  const load = (id) => {
    if (!(id in loaded)) {
      const made = (loaded[id] = { exports: {} });
      modules[id].call(made.exports, made, made.exports, load);
    }
    return loaded[id].exports;
  };
  load.g = globalThis;
  load.nmd = (made) => made;
  const found = Object.keys(modules).map(load);
  self.cytoscape = found.find((made) => typeof made === "function" && made.version);
  delete self.webpackChunkjupyter_cytoscape;
})();
"""


class LibraryHook(BuildHookInterface[Any]):
    """Writes the library and its licence beside the page before anything is packed."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Leaves `cytoscape.js` and `cytoscape.LICENSE.txt` in the page's folder."""
        folder = Path(self.root) / "surgeon" / "report" / "web"
        script, licence = folder / "cytoscape.js", folder / "cytoscape.LICENSE.txt"
        if not (script.is_file() and licence.is_file() and LOADER in script.read_text("utf-8")):
            piece, text = fetch()
            licence.write_text(text, encoding="utf-8")
            script.write_text(piece + LOADER, encoding="utf-8")
        build_data["artifacts"] += [f"/surgeon/report/web/{p.name}" for p in (script, licence)]


def fetch() -> tuple[str, str]:
    """Returns the library's text and its licence, as the package index has them."""
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*command, "--dest", name, PACKAGE], check=True)
        (wheel,) = Path(name).glob("*.whl")
        with zipfile.ZipFile(wheel) as found:
            piece = found.read(f"{BUNDLE}/{PIECE}")
            packed = json.loads(found.read(f"{BUNDLE}/third-party-licenses.json"))
    if hashlib.sha256(piece).hexdigest() != SHA256:
        raise RuntimeError(f"{PIECE} of {PACKAGE} is not the file that was looked at")
    said = {p["name"]: p for p in packed["packages"]}
    inside = (LIBRARY, "heap", "lodash.debounce", "lodash.get", "lodash.set", "lodash.topath")
    parts = [f"{n} {said[n]['versionInfo']}\n\n{said[n]['extractedText']}" for n in inside]
    return piece.decode("utf-8"), "\n\n".join(parts)
