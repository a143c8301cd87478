# The agent's images, of what `cargo xtask image` puts beside this file: nothing is fetched from a registry.
#
#   --target agent    the static binary, and nothing to run but that
#   --target tools    with nft and iptables, for the modes of netfilter

FROM scratch AS agent
LABEL org.opencontainers.image.title="proxy-agent" \
      org.opencontainers.image.description="A kube-proxy replacement in Rust and eBPF" \
      org.opencontainers.image.licenses="MIT OR Apache-2.0"
COPY agent/ /
ENV PATH=/usr/sbin:/usr/bin:/sbin:/bin
ENTRYPOINT ["/usr/bin/proxy-agent"]

FROM scratch AS tools
LABEL org.opencontainers.image.title="proxy-agent" \
      org.opencontainers.image.description="A kube-proxy replacement in Rust and eBPF, with nft and iptables" \
      org.opencontainers.image.licenses="MIT OR Apache-2.0"
COPY debian/ /
COPY agent/ /
ENV PATH=/usr/sbin:/usr/bin:/sbin:/bin
ENTRYPOINT ["/usr/bin/proxy-agent"]
