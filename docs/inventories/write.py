"""`python docs/inventories/write.py`: writes the inventories that docs/conf.py links by.

An inventory tells Sphinx the address of each object of another project. The build has no network, so the few objects
that our signatures and pages name are listed here. Add a row where the build says "reference target not found".
"""

from pathlib import Path
from types import SimpleNamespace

from sphinx.util.inventory import InventoryFile

FOLDER = Path(__file__).resolve().parent

# Project -> kind of object -> {name: page}; the anchor is the name.
OBJECTS = {
    "python": {
        "py:class": {
            "int": "library/functions.html",
            "float": "library/functions.html",
            "bool": "library/functions.html",
            "tuple": "library/stdtypes.html",
            "list": "library/stdtypes.html",
            "dict": "library/stdtypes.html",
            "str": "library/stdtypes.html",
            "object": "library/functions.html",
            "type": "library/functions.html",
            "os.PathLike": "library/os.html",
            "pathlib.Path": "library/pathlib.html",
            "collections.abc.Callable": "library/collections.abc.html",
            "collections.abc.Iterable": "library/collections.abc.html",
            "collections.abc.Iterator": "library/collections.abc.html",
            "collections.abc.Mapping": "library/collections.abc.html",
            "collections.abc.Sequence": "library/collections.abc.html",
        },
        "py:data": {
            "None": "library/constants.html",
            "typing.Any": "library/typing.html",
            "typing.Literal": "library/typing.html",
        },
        "py:exception": {
            "ImportError": "library/exceptions.html",
            "OSError": "library/exceptions.html",
            "RuntimeError": "library/exceptions.html",
            "TypeError": "library/exceptions.html",
            "ValueError": "library/exceptions.html",
        },
    },
    "torch": {
        "py:class": {
            "torch.Tensor": "tensors.html",
            "torch.Generator": "generated/torch.Generator.html",
            "torch.device": "tensor_attributes.html",
            "torch.dtype": "tensor_attributes.html",
            "torch.nn.Linear": "generated/torch.nn.Linear.html",
            "torch.nn.Module": "generated/torch.nn.Module.html",
        },
    },
    "numpy": {
        "py:class": {
            "numpy.ndarray": "reference/generated/numpy.ndarray.html",
            "numpy.dtype": "reference/generated/numpy.dtype.html",
            "numpy.float32": "reference/arrays.scalars.html",
            "numpy.int64": "reference/arrays.scalars.html",
        },
    },
}


class PythonObjects:
    """The objects of one project, as InventoryFile asks a Sphinx domain for them."""

    name = "py"

    def __init__(self, kinds):
        self.kinds = kinds

    def get_objects(self):
        for kind, pages in self.kinds.items():
            for name, page in pages.items():
                yield name, name, kind.removeprefix("py:"), page, name, 1


def write(folder: Path = FOLDER) -> None:
    """Writes PROJECT.inv for each project."""
    for project, kinds in OBJECTS.items():
        domains = SimpleNamespace(sorted=lambda kinds=kinds: [PythonObjects(kinds)])
        environment = SimpleNamespace(config=SimpleNamespace(project=project, version="stable"), domains=domains)
        builder = SimpleNamespace(get_target_uri=lambda page: page)
        InventoryFile.dump(folder / f"{project}.inv", environment, builder)


if __name__ == "__main__":
    write()
