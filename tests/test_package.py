"""What is installed: the files that the code reads must come with it."""

from configparser import ConfigParser
from pathlib import Path

import pmpseg

ROOT = Path(__file__).parents[1]


def test_every_asset_is_package_data():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    package = Path(pmpseg.__file__).parent
    listed = {path for pattern in setup["options.package_data"]["pmpseg"].split() for path in package.glob(pattern)}
    assets = {path for path in (package / "assets").rglob("*") if path.is_file()}
    assert assets <= listed and package / "py.typed" in listed
    assert {"defaults.yaml", "scenes.yaml", "model.safetensors"} <= {path.name for path in assets}
