"""Puts `sample/` and `configs/` into the wheel, within the package; the rest stands in pyproject.toml."""

from setuptools import find_packages, setup

FOLDERS = ("configs", "sample/checkpoint", "sample/data")
SHIPPED = {f"pipeline.shipped.{folder.replace('/', '.')}": folder for folder in FOLDERS}

setup(
    packages=[*find_packages(include=["pipeline*"]), *SHIPPED],
    package_dir=SHIPPED,
    package_data={
        "pipeline": ["py.typed", "report/templates/*"],
        **{package: ["*", "*/*/*.csv"] for package in SHIPPED},
    },
)
