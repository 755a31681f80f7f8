"""The `dante` command: what consumers, providers and operators type. Uses the SDK only."""
