"""Format nodes: what the bytes of an image file mean. Imports only `block/`, errors and units."""
