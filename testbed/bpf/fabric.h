/* SPDX-License-Identifier: GPL-2.0-only */
/* What the eBPF programs and testbed/kernel/layout.py share: the layout of every map.
 *
 * Every map is an array keyed by a small dense integer and mapped into the engine (BPF_F_MMAPABLE); layout.py
 * has the numpy twin of each struct, and a test compares the two by the object's BTF.
 *
 * One writer per field: "loader" writes before traffic, "enq"/"deq"/"rx" name the program that owns a field
 * (by atomic add where several CPUs may run it). Counters are never reset, only baselined by the reader.
 */
#ifndef TESTBED_FABRIC_H
#define TESTBED_FABRIC_H

#define TB_PRIORITIES 8
#define TB_ETH_HLEN 14
#define TB_IP_HLEN 20
#define TB_UDP_HLEN 8
#define TB_BTH_LEN 12
#define TB_AETH_LEN 4
#define TB_ICRC_LEN 4
#define TB_HEADERS_LEN (TB_ETH_HLEN + TB_IP_HLEN + TB_UDP_HLEN + TB_BTH_LEN)     /* 54 */
#define TB_ACK_LEN (TB_HEADERS_LEN + TB_AETH_LEN + TB_ICRC_LEN)                  /* 62 */
#define TB_CNP_LEN (TB_HEADERS_LEN + 16 + TB_ICRC_LEN)                           /* 74 */
#define TB_ROCE_PORT 4791
/* A CTS frame: an RDMA WRITE ONLY of one FIFO entry, told from data by the key of the sender's FIFO. */
#define TB_CTS_RKEY 0xc7500001
#define TB_CTS_INDEX_OFFSET (TB_HEADERS_LEN + 16 + 40)                           /* 110 */
#define TB_CTS_LEN (TB_HEADERS_LEN + 16 + 64 + TB_ICRC_LEN)                      /* 138 */

/* Selective retransmission: packets that may be under way beyond the acknowledged ones, a power of two. */
#define TB_WINDOW 4096
#define TB_WINDOW_WORDS (TB_WINDOW / 64)
/* An ACK that names what came out of order has 20 bytes more: 0x01, a PSN (24 bits), and a bit for each of 128 packets. */
#define TB_SACK_PACKETS 128
#define TB_SACK_TYPE 0x01
#define TB_SACK_LEN (TB_ACK_LEN + 20)                                            /* 82 */
/* A packet so far behind the newest is answered unasked: no block of a later answer would name it. */
#define TB_SACK_LATE_PACKETS 64

/* 802.1Qbb: MAC control, opcode 0x0101, a bit and 16 bits of quanta per priority. */
#define TB_ETH_P_MAC_CONTROL 0x8808
#define TB_PFC_OPCODE 0x0101
/* IEEE local experimental EtherTypes: a kick makes a reopened queue look at its frames (kernel/gate.py). */
#define TB_ETH_P_KICK 0x88b5   /* from the other end of the link, turned round */
#define TB_ETH_P_KICKED 0x88b6 /* on its way back, dropped */

/* A port's scheduler, 10: (DATA_HANDLE in kernel/tc.py), whose classes skb->priority names. Where there is none nobody looks. */
#define TB_DATA_HANDLE 0x100000
/* Class of a queue pair of the kernel's that has a row of the QP table: 70:100 and following, one for each connection
 * (kernel/qp_shaper.py).
 */
#define TB_QP_CLASS(row) (0x700100 + ((row) >> 1))

/* skb->mark of the copy of a marked frame that host_egress turns into a CNP. */
#define TB_MARK_NOTIFY 0x7b000081

/* A NIC's attachment leads RoCE out of the host's namespace, to where the sockets of a soft-RoCE are that knows no namespaces: a
 * veth pair whose end in the host has the NIC's interface index plus this.
 */
#define TB_ATTACHMENT 0x10000

/* Source-MAC marks of frames that no ingress program forwarded; see docs/architecture.md. */
#define TB_INGRESS_HOST 0x0000   /* left a host: accounted by the host's egress program */
#define TB_INGRESS_KERNEL 0xffff /* left a switch's own kernel: not accounted at all */

enum tb_port_flags {
	TB_PORT_HOST = 1,      /* the port belongs to a host */
	TB_PORT_PEER_HOST = 2, /* the other end belongs to a host */
	TB_PORT_ATTACHED = 512, /* RoCE that nobody here answers goes out by the port's attachment */
	TB_PORT_DOWN = 256,    /* engine: its link is down: what arrives is lost, and adaptive routing passes it over */
	TB_PORT_KERNEL_QPS = 1024, /* carrier: queue pairs of the kernel's on this NIC have rows of the QP table */
};

struct tb_config {             /* .rodata.config, fixed at load */
	__u32 ifindex_base;        /* ifindex of port id 0 (which does not exist) */
	__u32 ports;               /* number of port ids, the unused id 0 included */
	__u32 slots;               /* row length of fib */
	__u32 host_network;        /* first address of the host links, host order (10.0.0.0) */
	__u32 qpn_base;            /* QPN of QP index 0 */
	__u32 qps;                 /* number of QPs */
	__u32 control_priorities;  /* bit per priority that uses the control queue */
	__u32 data_classes;        /* four bits per priority, 0 the lowest: its class below TB_DATA_HANDLE */
};

struct tb_port {               /* ports[id], loader */
	__u16 peer;                /* port id of the other end */
	__u16 node;                /* node index of this port */
	__u16 peer_node;           /* node index of the other end */
	__u16 flags;               /* enum tb_port_flags */
	__u8 peer_mac[6];
	__u8 reserved[2];
};

struct tb_queue {              /* queues[id * 8 + priority]: the egress queue of port id; two cache lines */
	__u64 enq_bytes;           /* enq */
	__u64 enq_packets;         /* enq */
	__u64 drop_packets;        /* enq */
	__u64 peak_bytes;          /* enq; reset by the engine between runs */
	__u64 deq_bytes;           /* deq, at the other end of the veth */
	__u64 deq_packets;         /* deq */
	__u64 marked_packets;      /* enq: CE set here */
	__u64 lost_packets;        /* deq: lost on the link behind this queue, discarded by the watchdog, without a way on */
	/* loader: marking by the depth after this frame, 0 up to kmin, 1 above kmax (0: never) */
	__u32 kmin_bytes;
	__u32 kmax_bytes;
	__u64 mark_slope;          /* probability per byte above kmin, in units of 2^-48 */
	__u64 limit_bytes;         /* depth beyond which lossy frames are dropped; 0: no limit of its own */
	__u64 reserved;            /* keeps the size */
	/* pause: the program that receives PFC frames on this port */
	__u64 pause_frames;        /* PFC frames for this priority, pause_quanta belongs to the last */
	__u64 pause_received_ns;   /* CLOCK_MONOTONIC */
	__u16 pause_quanta;        /* 0: resume */
	/* engine */
	__u16 discard;             /* the PFC watchdog drops what leaves this queue */
	__u32 loss_threshold;      /* frames are lost on the link behind with probability this * 2^-32 */
	__u64 xoff_frames;         /* of pause_frames, those with quanta > 0 */
};

struct tb_ingress {            /* ingress[id * 8 + priority]: what port id received and its switch still holds */
	/* loader */
	__u64 xoff_bytes;          /* static threshold; 0: alpha decides */
	__u64 alpha;               /* share of the free shared memory, in units of 2^-16 */
	__u64 hysteresis_bytes;    /* resume this much below the threshold */
	__u64 headroom_bytes;      /* for what arrives after a pause was asked for */
	__u32 lossless;            /* 0: not accounted, never pauses */
	/* enq sets, deq clears */
	__u32 xoff;                /* the peer is asked to pause */
	__s64 used_bytes;          /* enq adds, deq subtracts */
	__u64 changed_ns;          /* CLOCK_MONOTONIC of the last change of xoff */
	__u64 ceiling_bytes;       /* while xoff: drop beyond */
	__u64 peak_bytes;          /* enq; reset by the engine between runs */
	__u64 headroom_drops_packets; /* enq */
	__u64 xoffs;               /* enq: times that xoff was set */
	__u64 headroom_peak_bytes; /* enq: most that arrived after a pause was asked for; reset by the engine */
	__u64 changes;             /* enq, deq: changes of xoff */
	__u64 reserved[3];
};

struct tb_node {               /* nodes[index] */
	__s64 used_bytes;          /* enq adds, deq subtracts: shared packet memory in use */
	__u64 limit_bytes;         /* loader: all of it */
	__u64 no_route_packets;    /* enq: destinations outside the tables, left to the kernel */
	__u64 shared_bytes;        /* loader: without the headrooms; lossy data gets no more */
	__u64 reserved[4];
};

/* In the fib: every way there is lost, frames are dropped. -1 leaves them to the kernel. */
#define TB_UNREACHABLE (-2)

enum tb_selector {
	TB_SELECT_HASH = 0,
	TB_SELECT_ROUND_ROBIN = 1,
	TB_SELECT_RANDOM = 2,
	TB_SELECT_LEAST_DEPTH = 3,
	TB_SELECT_FLOWLET = 4,
};

enum tb_hash_function {
	TB_HASH_MURMUR3 = 0,
	TB_HASH_CRC32 = 1,
	TB_HASH_CRC16 = 2,
};

/* A member is a port id and, for TB_SELECT_LEAST_DEPTH, its weight; a port of weight 2 stands twice. */
#define TB_MEMBER_PORT(member) ((member) & 0xffff)
#define TB_MEMBER_WEIGHT(member) ((member) >> 16)
#define TB_MAX_CHOICES 64 /* members that TB_SELECT_LEAST_DEPTH can look at */
#define TB_FLOWLETS 65536 /* rows of the flowlet table, a power of two */

struct tb_group {              /* groups[index], loader */
	__u32 first_member;        /* into members[] */
	__u32 members;
	__u32 hash_fields;         /* HashField bits */
	__u32 seed;
	__u32 selector;            /* enum tb_selector */
	__u16 overrides;           /* whether exact-match entries are to be looked up first */
	__u16 hash_function;       /* enum tb_hash_function */
	__u64 gap_ns;              /* TB_SELECT_FLOWLET, wall */
};

struct tb_group_state {        /* group_states[index], switch */
	__u64 turn;                /* packets that took turns so far */
	__u64 zero;                /* nobody writes it */
};

struct tb_flowlet {            /* flowlets[], switch */
	__u64 last_ns;             /* CLOCK_MONOTONIC of the flow's last packet, 0: never seen */
	__u64 number;              /* pauses longer than the gap so far */
};

struct tb_override_key {       /* overrides{}, loader */
	__u32 node;
	__u32 src_address;
	__u32 dst_address;
	__u32 flow;                /* destination QP of RoCEv2, else the UDP or TCP source port, else 0 */
};

struct tb_kernel_qp_key {      /* kernel_qps{}, carrier: what RoCEv2 that crosses a NIC says of a queue pair of the kernel's */
	__u32 port;                /* the NIC; its way in or out shows in the address */
	__u32 dst_address;
	__u32 qpn;                 /* of the destination */
};

struct tb_qp {                 /* qps[qpn - qpn_base]; three cache lines; inactive rows may stand for queue pairs of the kernel's */
	/* loader, while the QP is idle */
	__u32 peer_qpn;
	__u32 initial_rx_psn;      /* PSN of rx_packets == 0 */
	__u32 initial_tx_psn;      /* PSN of acked_packets == 0 */
	__u16 udp_source_port;     /* of the ACKs, host order */
	__u8 active;               /* 0: packets for it go to the kernel */
	__u8 selective;            /* whether packets are taken out of order */
	/* rx: responder */
	__u64 rx_packets;          /* received in order; next expected PSN = initial_rx_psn + rx_packets */
	__u64 rx_payload_bytes;
	__u64 rx_messages;         /* MSN */
	__u64 last_message_ns;     /* CLOCK_MONOTONIC when the last message was complete */
	__u64 out_of_order_packets;
	__u64 duplicate_packets;
	__u64 sent_acks_packets;
	__u64 sent_naks_packets;
	__u64 nak_armed_at;        /* rx_packets + 1 at which a NAK was sent: one per gap */
	/* rx: requester */
	__u64 acked_packets;       /* cumulative */
	__u64 naks_packets;        /* NAKs received */
	__u64 nak_position;        /* rewind to this many packets */
	__u64 cnps_packets;        /* CNPs received */
	__u64 port;                /* loader: the NIC it lives on; elsewhere its number is unknown */
	/* rx: notification point */
	__u64 cnp_interval_ns;     /* loader: at most one CNP per this wall time; 0: none at all */
	__u64 cnp_sent_ns;         /* CLOCK_MONOTONIC of the last */
	__u64 sent_cnps_packets;
	__u64 ce_packets;          /* data packets that came marked */
	/* rx: requester */
	__u64 grants;              /* number of the latest grant received; cumulative */
	__u64 cts_packets;         /* CTS frames received */
	/* rx: loss recovery */
	__u64 rx_highest;          /* responder: packets up to the last that came out of order; selective: up to the highest */
	__u64 sacked_until;        /* requester: packets up to the highest that came out of order at the responder */
};

/* windows[qpn - qpn_base], where transport.loss_recovery is selective; bit n % TB_WINDOW is packet n, all below the
 * acknowledged ones are clear.
 */
struct tb_window {
	__u64 received[TB_WINDOW_WORDS]; /* rx: responder: came out of order; requester: the responder has said so */
	__u64 ends[TB_WINDOW_WORDS];     /* rx: responder: of these, the last packets of messages */
};

#endif
