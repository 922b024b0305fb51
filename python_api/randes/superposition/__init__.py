"""The integers that many fine-tunes are superposed into, and everything that is made of them."""
