"""Maps the top-level folders into one import package and builds the optional native library.

`kernels`, `train` and `bench` are installed as `s1engine.kernels`, … and never as top-level packages: Hugging Face's
`kernels` is a real distribution that transformers imports. For the same reason these folders hold no `__init__.py` at
their top: a regular package of that name in the working directory would win over the installed one.
"""

from glob import glob

from setuptools import Extension, find_namespace_packages, setup

MAPPED = ("kernels", "train", "bench")
NO_CACHES = ["*__pycache__*"]

packages = find_namespace_packages(include=["s1engine", "s1engine.*"], exclude=NO_CACHES)
for folder in MAPPED:
    packages.append(f"s1engine.{folder}")
    packages += [f"s1engine.{folder}.{name}" for name in find_namespace_packages(where=folder, exclude=NO_CACHES)]

setup(
    packages=packages,
    package_dir={f"s1engine.{folder}": folder for folder in MAPPED},
    package_data={"s1engine": ["py.typed"], "s1engine.train.tiny": ["model/*"]},
    ext_modules=[
        # Plain C ABI, read by ctypes: no Python or torch symbol in it. Without a compiler the build goes on without it.
        Extension(
            "s1engine._native",
            sources=sorted(glob("csrc/cpu/*.cpp")),
            depends=sorted(glob("csrc/**/*.h", recursive=True)),
            include_dirs=["csrc/include"],
            extra_compile_args=["-std=c++17", "-O2", "-Wall", "-Wextra"],
            language="c++",
            optional=True,
        )
    ],
)
