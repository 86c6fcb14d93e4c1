"""Did the policy get better, and would you believe it?"""
