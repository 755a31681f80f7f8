"""`dante` commands that run the platform, as opposed to using it: table name -> (module:function, help)."""
