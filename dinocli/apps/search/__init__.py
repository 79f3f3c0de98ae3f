"""Search among stored features: nearest neighbours, retrieval, copies, duplicates and curation."""
