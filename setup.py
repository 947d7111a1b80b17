"""Finds the packages: each top-level folder is the package `lutetia.<folder>`. Everything else is in pyproject.toml."""

from setuptools import find_packages, setup

ROOMS = ("system", "protocol", "models", "node", "coordinator", "simulation", "cli")

setup(
    packages=[
        f"lutetia.{package}" for room in ROOMS for package in (room, *(f"{room}.{below}" for below in find_packages(room)))
    ],
    package_dir={f"lutetia.{room}": room for room in ROOMS},
)
