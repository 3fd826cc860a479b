"Build the package from settings.ini; the lessons travel in the wheel as llm_course/lessons."

import configparser
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
parser = configparser.ConfigParser(delimiters=["="])
parser.read(ROOT / "settings.ini", encoding="utf-8")
config = parser["DEFAULT"]


def lines(key: str) -> list:
    "The non-empty lines of a setting that holds a list."
    return [line.strip() for line in config.get(key, "").splitlines() if line.strip()]


def extras() -> dict:
    "The extras: `hf_requirements` becomes `hf`, and so on."
    names = [key.removesuffix("_requirements") for key in config if key.endswith("_requirements")]
    return {name: lines(f"{name}_requirements") for name in names}


class BuildWithLessons(build_py):
    "Copy the notebooks beside the modules that were made from them."

    def run(self):
        super().run()
        if self.editable_mode:
            return  # the lessons are read from the checkout
        target = Path(self.build_lib) / config["lib_path"] / "lessons"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for path in self.lessons():
            shutil.copyfile(path, target / path.name)

    def get_outputs(self, include_bytecode=1):
        target = Path(self.build_lib) / config["lib_path"] / "lessons"
        copied = [] if self.editable_mode else [str(target / p.name) for p in self.lessons()]
        return super().get_outputs(include_bytecode) + copied

    def lessons(self):
        "The notebooks and the pictures they show."
        folder = ROOT / config["nbs_path"]
        return sorted(p for p in folder.iterdir() if p.suffix in {".ipynb", ".png", ".svg"})


setup(
    name=config["lib_name"],
    version=config["version"],
    description=config["description"],
    long_description=(ROOT / "README.md").read_text(encoding="utf-8")
    if (ROOT / "README.md").exists()
    else config["description"],
    long_description_content_type="text/markdown",
    keywords=config["keywords"],
    author=config["author"],
    author_email=config["author_email"],
    url=config["git_url"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Education",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=f">={config['min_python']}",
    packages=find_packages(include=[config["lib_path"], f"{config['lib_path']}.*"]),
    package_data={config["lib_path"]: ["assets/*"]},
    install_requires=lines("requirements"),
    extras_require=extras(),
    entry_points={
        "console_scripts": lines("console_scripts"),
        "nbdev": [f"{config['lib_path']}={config['lib_path']}._modidx:d"],
    },
    cmdclass={"build_py": BuildWithLessons},
    zip_safe=False,
)
