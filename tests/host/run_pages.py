"""report.html as the tests read it, and a run that has one."""

from html.parser import HTMLParser

import pytest

from tests.glb_files import glb, linear
from tests.run_folders import run_folder

EVIL = "</script><img src=x onerror=alert(1)> \"'<b>&amp; </title>"


class Page(HTMLParser):
    """Elements as (name, attributes, text in it)."""

    def __init__(self, path):
        super().__init__()
        self.html = path.read_text("utf-8")
        self.elements, self._open = [], []
        self.feed(self.html)
        self.close()

    def handle_starttag(self, name, attributes):
        self.elements.append([name, dict(attributes), ""])
        if name not in ("img", "meta", "wbr"):
            self._open.append(self.elements[-1])

    def handle_endtag(self, name):
        assert self._open.pop()[0] == name  # well formed

    def handle_data(self, data):
        for element in self._open:
            element[2] += data

    def all(self, name, **wanted):
        return [e for e in self.elements if e[0] == name and wanted.items() <= e[1].items()]

    @property
    def text(self):
        return next(e[2] for e in self.elements if e[0] == "body")

    def rows(self):
        """What stands beside what in the lists of facts."""
        names = [e[2] for e in self.elements if e[0] == "dt"]
        return dict(zip(names, [e[2] for e in self.elements if e[0] == "dd"], strict=True))


@pytest.fixture
def run(tmp_path):
    return run_folder(tmp_path / "a_red_mushroom@1")


def write_mesh(path, points, rgb, faces):
    """A glb: y up and the front on +z, its colours as light."""
    blob = points[:, [1, 2, 0]].astype("<f4").tobytes() + linear(rgb).astype("<f4").tobytes()
    blob += faces.astype("<u4").tobytes()
    n, size = len(points), 12 * len(points)
    views = [{"byteOffset": 0, "byteLength": size}, {"byteOffset": size, "byteLength": size}]
    views.append({"byteOffset": 2 * size, "byteLength": faces.size * 4})
    accessors = [
        {"bufferView": i, "componentType": 5126, "count": n, "type": "VEC3"} for i in (0, 1)
    ]
    accessors += [{"bufferView": 2, "componentType": 5125, "count": faces.size, "type": "SCALAR"}]
    primitive = {"attributes": {"POSITION": 0, "COLOR_0": 1}, "indices": 2}
    tree = {"bufferViews": views, "accessors": accessors, "meshes": [{"primitives": [primitive]}]}
    path.write_bytes(glb(tree, blob))
