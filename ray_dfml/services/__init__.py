"""Teachers that are only asked: the ledger of queries, clients of prediction services, and a server of one's own."""
