"""Data only: one TOML a recipe; `dinocli.shipped` reads them."""
