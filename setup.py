"""Puts the start-up hook for lm-eval's task search into wheels: `sublim.pth` and `sublim.start`.

The second is the first for Python 3.15 and later (PEP 829), which then ignore the import line in
the first. setuptools has no declarative way to place a file at the top of site-packages: a
`build_py` copies them into a regular wheel; an editable wheel holds only links, so they are added
to the built archive.
"""

import base64
import hashlib
import shutil
import zipfile
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

HOOKS = [Path(__file__).with_name(name) for name in ("sublim.pth", "sublim.start")]


class BuildWithHook(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:
            for hook in HOOKS:
                shutil.copyfile(hook, Path(self.build_lib) / hook.name)


class EditableWithHook(editable_wheel):
    def run(self):
        super().run()
        for wheel in Path(self.dist_dir).glob("sublim-*editable*.whl"):
            for hook in HOOKS:
                add_to_wheel(wheel, hook)


def add_to_wheel(wheel, file):
    data = file.read_bytes()
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    changed = wheel.with_suffix(".tmp")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(changed, "w", zipfile.ZIP_DEFLATED) as new:
        for item in old.infolist():
            content = old.read(item)
            if item.filename.endswith(".dist-info/RECORD"):
                content += f"{file.name},sha256={digest},{len(data)}\n".encode()
            new.writestr(item, content)
        new.writestr(file.name, data)
    changed.replace(wheel)


setup(cmdclass={"build_py": BuildWithHook, "editable_wheel": EditableWithHook})
