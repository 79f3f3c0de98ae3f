"""The demo: a whole job on a drawn image set."""
