"""Shipped presets, one TOML per recipe; `dinocli.method.shipped` reads them."""
