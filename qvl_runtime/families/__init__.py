"""Model families: what each computes, reads and writes. Everything else in the package knows none of them."""
