"""Write what a release consists of as CycloneDX 1.6 JSON: `python tests/trust/sbom.py dist/deeplabzoo-*.whl`.

The wheel itself with its hash, every distribution of the light install as it is installed here, who needs whom, and the bundled
weights with their hashes and licences. The same wheel in the same installation gives the same bytes: the serial number is made
of the hash, and the time is the one that SOURCE_DATE_EPOCH names, as for the wheel.
"""

import argparse
import datetime
import hashlib
import os
import sys
import uuid
import zipfile
from collections.abc import Sequence
from email.parser import Parser
from pathlib import Path

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from dependencies import UNSTATED, Dependency, direct, light_install
from packageurl import PackageURL

from deeplabzoo.files import write_atomically
from deeplabzoo.hub.manifest import BundledSource, WeightRow, released

_REPRODUCIBLE_EPOCH = 1580601600
"""What hatchling takes where SOURCE_DATE_EPOCH is not set: 2 February 2020."""


def bill_of_materials(wheel: Path) -> str:
    """Return the document for a wheel, as JSON."""
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    bom = Bom(serial_number=uuid.uuid5(uuid.NAMESPACE_URL, f"deeplabzoo:{sha256}"))
    epoch = int(os.environ.get("SOURCE_DATE_EPOCH") or _REPRODUCIBLE_EPOCH)
    bom.metadata.timestamp = datetime.datetime.fromtimestamp(epoch, datetime.UTC)
    bom.metadata.component = root = _wheel(wheel, sha256)
    installed = light_install()
    parts = {name: _distribution(one) for name, one in installed.items()}
    weights = [_weights(row) for row in released() if isinstance(row.source, BundledSource)]
    for part in (*parts.values(), *weights):
        bom.components.add(part)
    for name, one in installed.items():
        bom.register_dependency(parts[name], [parts[needed] for needed in one.requires])
    bom.register_dependency(root, [*(parts[name] for name in direct()), *weights])
    return JsonV1Dot6(bom).output_as_string(indent=2) + "\n"


def _wheel(wheel: Path, sha256: str) -> Component:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(archive.read(name).decode())
    return Component(
        name=metadata["Name"],
        version=metadata["Version"],
        type=ComponentType.LIBRARY,
        description=metadata["Summary"],
        licenses=[LicenseFactory().make_from_string(metadata["License-Expression"])],
        purl=PackageURL("pypi", name=metadata["Name"], version=metadata["Version"]),
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=sha256)],
        bom_ref="wheel",
    )


def _distribution(one: Dependency) -> Component:
    return Component(
        name=one.name,
        version=one.version,
        type=ComponentType.LIBRARY,
        licenses=[] if one.licence == UNSTATED else [LicenseFactory().make_from_string(one.licence)],
        purl=PackageURL("pypi", name=one.name, version=one.version),
        bom_ref=f"{one.name}=={one.version}",
    )


def _weights(row: WeightRow) -> Component:
    return Component(
        name=row.name,
        version=row.tag,
        type=ComponentType.MACHINE_LEARNING_MODEL,
        licenses=[LicenseFactory().make_from_string(row.license.weights)],
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=row.sha256 or "")],
        properties=[Property(name="deeplabzoo:training-data", value=row.license.data)],
        bom_ref=f"weights:{row.full_name}",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Write the document beside the wheel."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path)
    wheel: Path = parser.parse_args(argv).wheel
    text = bill_of_materials(wheel).encode()
    write_atomically(wheel.with_suffix(".cdx.json"), lambda file: file.write(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
