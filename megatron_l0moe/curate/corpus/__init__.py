"""What a corpus is read from: shards, lines, records, and the catalog of its documents."""
