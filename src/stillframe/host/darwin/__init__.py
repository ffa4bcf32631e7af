"""What macOS does differently: file clones, process identities. The rest of ``host`` asks here.

Written from Apple's manual pages and headers, and checked against no Mac.
"""
