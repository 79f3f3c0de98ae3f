"""Decoding: from the bytes of a file to pixels."""

from dinocli.data.decode.image import decode as decode
