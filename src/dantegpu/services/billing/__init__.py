"""billing-payment-service: wallets, the double-entry ledger, holds, receipts. All amounts are integer micro-$dGPU.

The rules of money are `domain.ledger`; the tables make what must never happen impossible even for wrong code.
"""
