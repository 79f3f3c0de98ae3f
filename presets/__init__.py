"""Data only: one TOML a recipe; `dinocli.method.shipped` reads them."""
