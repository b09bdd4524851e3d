"""All that is about the platform and about defects upstream; nothing else asks CPU or GPU."""
