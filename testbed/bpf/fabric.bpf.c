// SPDX-License-Identifier: GPL-2.0-only
/* The per-packet half of the fabric: what a switch port and a NIC do with each frame.
 *
 *   switch_ingress  a frame reached a switch: it left the upstream queue; choose the egress port, admit, redirect
 *   host_egress     a frame leaves a host (NIC or kernel): account it and choose the transmit queue
 *   host_ingress    a frame reached a host: it left the leaf's queue; RoCEv2 for our QPs is answered here
 *   attachment_ingress  a frame of a soft-RoCE device outside the host's namespace: it leaves by the NIC
 *
 * Depth of a queue = enq - deq. The frame is added by the program that redirects it to the port and subtracted
 * by the program at the other end of the veth, so the figure is exact whatever the qdisc in between does.
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/pkt_cls.h>
#include <linux/udp.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "fabric.h"

char LICENSE[] SEC("license") = "GPL";

SEC(".rodata.config") const volatile struct tb_config config = {};

/* Arrays, so that the engine maps them and the JIT inlines the lookup; sized by the loader. */
#define TB_ARRAY(name_, type_)                                                                                 \
	struct {                                                                                                   \
		__uint(type, BPF_MAP_TYPE_ARRAY);                                                                      \
		__uint(map_flags, BPF_F_MMAPABLE);                                                                     \
		__uint(max_entries, 1);                                                                                \
		__type(key, __u32);                                                                                    \
		__type(value, type_);                                                                                  \
	} name_ SEC(".maps")

TB_ARRAY(tb_ports, struct tb_port);
TB_ARRAY(tb_queues, struct tb_queue);
TB_ARRAY(tb_ingress, struct tb_ingress);
TB_ARRAY(tb_nodes, struct tb_node);
TB_ARRAY(tb_fib, __s32);      /* [node * slots + slot]: group, -1 = none, TB_UNREACHABLE */
TB_ARRAY(tb_groups, struct tb_group);
TB_ARRAY(tb_members, __u32);  /* egress port ids */
TB_ARRAY(tb_qps, struct tb_qp);
TB_ARRAY(tb_windows, struct tb_window);
TB_ARRAY(tb_probe, __u64);    /* [0] arrival of the last fidelity probe, CLOCK_MONOTONIC ns; [1] its number */

/* Rows of tb_qps that stand for queue pairs of the kernel's. A hash map, for the kernel chooses their numbers. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct tb_kernel_qp_key);
	__type(value, __u32);
} tb_kernel_qps SEC(".maps");

/* CRC-32 of one byte (IEEE 802.3, reflected): 256 entries written by the loader, which gets them from zlib. */
SEC(".rodata.crc") const volatile __u32 crc_table[256] = {};

struct bth {
	__u8 opcode;
	__u8 flags;
	__be16 pkey;
	__be32 dest_qp; /* FECN, BECN, reserved in the top byte */
	__be32 psn;     /* AckReq in the top bit */
} __attribute__((packed));

#define MAC_INGRESS(mac) (((__u16)(mac)[4] << 8) | (mac)[5])

static __always_inline __u32 mix(__u32 h)
{
	h ^= h >> 16;
	h *= 0x85ebca6b;
	h ^= h >> 13;
	h *= 0xc2b2ae35;
	h ^= h >> 16;
	return h;
}

static __always_inline __u32 crc_byte(__u32 crc, __u8 byte)
{
	__u32 index = crc ^ byte;

	/* Or the compiler masks first, and the verifier of Linux 6.1 knows no bound of an XOR of 32 bits. */
	asm volatile("" : "+r"(index));
	return crc_table[index & 0xff] ^ (crc >> 8);
}

static __always_inline struct tb_queue *queue_of(__u32 port, __u32 priority)
{
	__u32 key = port * TB_PRIORITIES + (priority & (TB_PRIORITIES - 1));

	return bpf_map_lookup_elem(&tb_queues, &key);
}

static __always_inline struct tb_ingress *ingress_of(__u32 port, __u32 priority)
{
	__u32 key = port * TB_PRIORITIES + (priority & (TB_PRIORITIES - 1));

	return bpf_map_lookup_elem(&tb_ingress, &key);
}

static __always_inline struct tb_port *port_of(__u32 id)
{
	return bpf_map_lookup_elem(&tb_ports, &id);
}

static __always_inline struct tb_node *node_of(__u32 index)
{
	return bpf_map_lookup_elem(&tb_nodes, &index);
}

static __always_inline __u32 priority_of(const struct iphdr *ip)
{
	return ip->tos >> 5; /* DSCP >> 3 */
}

/* Class of a priority in a port's scheduler; what is no data priority has that of one. */
static __always_inline __u32 data_class(__u32 priority)
{
	return TB_DATA_HANDLE + (config.data_classes >> 4 * (priority & (TB_PRIORITIES - 1)) & 15);
}

/* Transmit queue 0 (mapping 1) carries data, 1 (mapping 2) control; netdev_pick_tx() honours the mapping. Of data the class says
 * which of the queues behind it.
 */
static __always_inline void choose_transmit_queue(struct __sk_buff *skb, __u32 priority)
{
	skb->queue_mapping = (config.control_priorities >> priority) & 1 ? 2 : 1;
	skb->priority = data_class(priority);
}

/* What of the shared memory is free, never negative. */
static __always_inline __u64 free_shared(const struct tb_node *node)
{
	__s64 left = (__s64)node->shared_bytes - node->used_bytes;

	return left > 0 ? left : 0;
}

/* Ingress bytes above which to pause: static, or a share of what is free (dynamic threshold). */
static __always_inline __u64 xoff_threshold(const struct tb_ingress *ingress, const struct tb_node *node)
{
	return ingress->xoff_bytes ?: (free_shared(node) * ingress->alpha) >> 16;
}

/* A frame that came in at a lossless priority has left the switch. */
static __always_inline void release_ingress(__u32 port, __u32 priority, const struct tb_node *node, __u32 len)
{
	struct tb_ingress *ingress = ingress_of(port, priority);
	__s64 used;

	if (!ingress || !ingress->lossless)
		return;
	used = __sync_fetch_and_add(&ingress->used_bytes, -(__s64)len) - len;
	/* What has nothing left here resumes, whatever the threshold: no later frame of its own would ask again. */
	if (ingress->xoff &&
	    (used <= 0 || used + (__s64)ingress->hysteresis_bytes <= (__s64)xoff_threshold(ingress, node))) {
		ingress->changed_ns = bpf_ktime_get_ns();
		ingress->xoff = 0;
		__sync_fetch_and_add(&ingress->changes, 1);
	}
}

/* The frame, received by port `id` with `mark` in its source MAC, left the egress queue at the other end of the link. Returns
 * nonzero if the link then lost it.
 *
 * A function to the verifier, which thus goes through it once: inline, each of its ways would be followed through all that
 * comes after, and loading an object, hence building a fabric, took ten times as long.
 */
__attribute__((noinline)) int tb_account_dequeue(__u32 id, __u32 mark, __u32 priority, __u32 len)
{
	struct tb_port *port = port_of(id);
	struct tb_queue *queue;
	struct tb_node *node;
	int lost;

	if (!port)
		return 0;
	lost = port->flags & TB_PORT_DOWN;

	/* Whatever source MAC a host writes, its egress program has counted the frame. */
	if (!(port->flags & TB_PORT_PEER_HOST) && mark == TB_INGRESS_KERNEL)
		return lost;
	queue = queue_of(port->peer, priority);
	if (!queue)
		return 0;
	__sync_fetch_and_add(&queue->deq_bytes, len);
	__sync_fetch_and_add(&queue->deq_packets, 1);
	if (!(port->flags & TB_PORT_PEER_HOST)) {
		node = node_of(port->peer_node);
		if (node) {
			__sync_fetch_and_add(&node->used_bytes, -(__s64)len);
			release_ingress(mark, priority, node, len);
		}
	}
	if (lost || queue->discard || (queue->loss_threshold && bpf_get_prandom_u32() < queue->loss_threshold)) {
		__sync_fetch_and_add(&queue->lost_packets, 1);
		return 1;
	}
	return 0;
}

/* Returns the depth with this frame. */
static __always_inline __u64 account_enqueue(struct tb_queue *queue, __u32 len, __u32 packets)
{
	__u64 depth = __sync_fetch_and_add(&queue->enq_bytes, len) + len - queue->deq_bytes;

	__sync_fetch_and_add(&queue->enq_packets, packets);
	if (depth > queue->peak_bytes)
		queue->peak_bytes = depth;
	return depth;
}

/* Marks CE by the instantaneous depth, as a switch's RED profile without averaging does (DCQCN's congestion point). */
static __always_inline void mark_congestion(struct tb_queue *queue, struct iphdr *ip, __u64 depth)
{
	__u32 old, check;

	if (!queue->kmax_bytes || depth <= queue->kmin_bytes || !(ip->tos & 3) || (ip->tos & 3) == 3)
		return;
	if (depth <= queue->kmax_bytes &&
	    bpf_get_prandom_u32() >= ((depth - queue->kmin_bytes) * queue->mark_slope) >> 16)
		return;
	/* RFC 1624: HC' = ~(~HC + ~m + m') over the word of version, header length and TOS */
	old = ip->tos;
	ip->tos |= 3;
	check = (__u16)~bpf_ntohs(ip->check) + (__u16)~old + ip->tos;
	check = (check & 0xffff) + (check >> 16);
	check = (check & 0xffff) + (check >> 16);
	ip->check = bpf_htons(~check);
	__sync_fetch_and_add(&queue->marked_packets, 1);
}

/* Whether a switch takes a frame in: the shared memory, a lossless frame's headroom, a lossy frame's queue. Control frames have all
 * of the memory: they do not wait, and without ACKs nothing that is lossless would ever be known to have arrived.
 */
static __always_inline int admit(struct tb_node *node, struct tb_queue *queue, struct tb_ingress *ingress, __u32 len,
				 __u32 priority)
{
	__s64 used = node->used_bytes + len;
	__u64 depth;

	if (ingress && ingress->lossless) {
		if (used > (__s64)node->limit_bytes ||
		    (ingress->xoff && ingress->used_bytes + (__s64)len > (__s64)ingress->ceiling_bytes)) {
			__sync_fetch_and_add(&ingress->headroom_drops_packets, 1);
			return 0;
		}
		return 1;
	}
	if ((config.control_priorities >> priority) & 1) /* all of the memory, whatever the port's part of it */
		return used <= (__s64)node->limit_bytes;
	if (used > (__s64)node->shared_bytes)
		return 0;
	depth = queue->enq_bytes - queue->deq_bytes + len;
	return !queue->limit_bytes || depth <= queue->limit_bytes;
}

/* A frame came in at a lossless priority: ask the peer to pause where it is one too many. */
static __always_inline void charge_ingress(struct tb_ingress *ingress, const struct tb_node *node, __u32 len)
{
	__s64 used = __sync_fetch_and_add(&ingress->used_bytes, (__s64)len) + len, over;

	if (used > (__s64)ingress->peak_bytes)
		ingress->peak_bytes = used;
	if (ingress->xoff) {
		over = used - (__s64)(ingress->ceiling_bytes - ingress->headroom_bytes);
		if (over > (__s64)ingress->headroom_peak_bytes)
			ingress->headroom_peak_bytes = over;
		return;
	}
	if (used > (__s64)xoff_threshold(ingress, node)) {
		ingress->ceiling_bytes = used + ingress->headroom_bytes;
		ingress->changed_ns = bpf_ktime_get_ns();
		ingress->xoffs++;
		ingress->xoff = 1;
		__sync_fetch_and_add(&ingress->changes, 1);
	}
}

/* The start of the frame and its end. Both fields are 32 bits wide in struct __sk_buff and pointers to the verifier. Seen as
 * 32-bit integers, clang 17 to 19 merge a load with one before pull() and move it by a 32-bit register: a pointer no more
 * ("R3 invalid mem access 'scalar'"). The assembly hides their width. Source: cilium, bpf/include/bpf/ctx/skb.h.
 */
#define TB_PACKET_POINTER(field_)                                                                              \
	static __always_inline void *packet_##field_(const struct __sk_buff *skb)                              \
	{                                                                                                      \
		void *pointer;                                                                                 \
                                                                                                               \
		asm volatile("%0 = *(u32 *)(%1 + %2)"                                                          \
			     : "=r"(pointer)                                                                   \
			     : "r"(skb), "i"(__builtin_offsetof(struct __sk_buff, field_)));                   \
		return pointer;                                                                                \
	}

TB_PACKET_POINTER(data)
TB_PACKET_POINTER(data_end)

/* Linear bytes up to `want`: an AF_PACKET frame larger than a page arrives with 14. */
static __always_inline int pull(struct __sk_buff *skb, __u32 want)
{
	if (packet_data(skb) + want <= packet_data_end(skb))
		return 0;
	return bpf_skb_pull_data(skb, want < skb->len ? want : skb->len);
}

/* Unicast IPv4 without a VLAN tag is what the fabric carries and counts; all programs must agree on it. A tag stands
 * in the frame when a host sends it and beside it (vlan_present) once it was received.
 */
static __always_inline int is_carried(const struct __sk_buff *skb, const struct ethhdr *eth)
{
	return eth->h_proto == bpf_htons(ETH_P_IP) && !(eth->h_dest[0] & 1) && !skb->vlan_present;
}

struct pfc_frame {
	struct ethhdr eth;
	__be16 opcode;
	__be16 enabled;
	__be16 quanta[TB_PRIORITIES];
} __attribute__((packed));

/* What is not carried: a PFC frame is noted for the tick, a kick turned round, all else left to the kernel. A function to the
 * verifier, as tb_account_dequeue() is.
 */
__attribute__((noinline)) int tb_receive_other(struct __sk_buff *skb)
{
	__u32 id = skb->ifindex - config.ifindex_base, priority;
	struct tb_port *port = port_of(id);
	struct pfc_frame *frame;
	struct tb_queue *queue;
	struct ethhdr *eth;

	if (pull(skb, sizeof(*frame)) < 0)
		return TC_ACT_OK;
	frame = packet_data(skb);
	if ((void *)(frame + 1) > packet_data_end(skb))
		return TC_ACT_OK;
	eth = &frame->eth;
	if (eth->h_proto == bpf_htons(TB_ETH_P_KICKED))
		return TC_ACT_SHOT;
	if (eth->h_proto == bpf_htons(TB_ETH_P_KICK)) {
		eth->h_proto = bpf_htons(TB_ETH_P_KICKED);
		skb->queue_mapping = 1;
		skb->priority = data_class(bpf_ntohs(frame->opcode));
		return bpf_redirect(skb->ifindex, 0);
	}
	if (port && port->flags & TB_PORT_DOWN)
		return TC_ACT_SHOT; /* kicks are the emulator's own and pass */
	if (eth->h_proto != bpf_htons(TB_ETH_P_MAC_CONTROL) || frame->opcode != bpf_htons(TB_PFC_OPCODE))
		return TC_ACT_OK;
#pragma unroll
	for (priority = 0; priority < TB_PRIORITIES; priority++) {
		if (!(bpf_ntohs(frame->enabled) >> priority & 1))
			continue;
		queue = queue_of(id, priority);
		if (!queue)
			continue;
		queue->pause_quanta = bpf_ntohs(frame->quanta[priority]);
		queue->pause_received_ns = bpf_ktime_get_ns();
		if (queue->pause_quanta)
			queue->xoff_frames++;
		__sync_fetch_and_add(&queue->pause_frames, 1);
	}
	return TC_ACT_SHOT;
}

#include "selectors.h"

SEC("tc")
int switch_ingress(struct __sk_buff *skb)
{
	__u32 id = skb->ifindex - config.ifindex_base;
	struct tb_port *port, *egress_port;
	struct tb_ingress *ingress;
	struct tb_group *group;
	struct tb_queue *queue;
	struct tb_node *node;
	struct ethhdr *eth;
	struct iphdr *ip;
	__u32 len = skb->len, priority, slot, key, egress_id;
	__s32 *group_index;
	void *data, *end;

	if (pull(skb, TB_HEADERS_LEN) < 0 && pull(skb, TB_ETH_HLEN + TB_IP_HLEN) < 0)
		return TC_ACT_OK;
	data = packet_data(skb);
	end = packet_data_end(skb);
	eth = data;
	ip = data + TB_ETH_HLEN;
	if ((void *)(ip + 1) > end)
		return TC_ACT_OK;
	port = port_of(id);
	if (!port)
		return TC_ACT_OK;
	if (!is_carried(skb, eth))
		return tb_receive_other(skb);
	priority = priority_of(ip);
	if (tb_account_dequeue(id, MAC_INGRESS(eth->h_source), priority, len))
		return TC_ACT_SHOT;

	slot = (bpf_ntohl(ip->daddr) - config.host_network) >> 1;
	if (slot >= config.slots || !(bpf_ntohl(ip->daddr) & 1) || ip->ttl <= 1 || ip->ihl != 5)
		return TC_ACT_OK; /* the switch itself, TTL expiry, options: the kernel, whose routes mirror the tables */
	key = port->node * config.slots + slot;
	group_index = bpf_map_lookup_elem(&tb_fib, &key);
	if (group_index && *group_index == TB_UNREACHABLE) {
		queue = queue_of(port->peer, priority); /* lost behind the port it came from */
		if (queue)
			__sync_fetch_and_add(&queue->lost_packets, 1);
		return TC_ACT_SHOT;
	}
	if (!group_index || *group_index < 0)
		goto no_route;
	key = *group_index;
	group = bpf_map_lookup_elem(&tb_groups, &key);
	if (!group || !group->members)
		goto no_route;

	egress_id = select_egress(group, key, port->node, ip, end, priority);
	egress_port = port_of(egress_id);
	queue = queue_of(egress_id, priority);
	ingress = ingress_of(id, priority);
	node = node_of(port->node);
	if (!egress_port || !queue || !ingress || !node)
		goto no_route;

	/* Admission: the drop comes before the accounting, so that enq - deq never drifts. */
	if (!admit(node, queue, ingress, len, priority)) {
		__sync_fetch_and_add(&queue->drop_packets, 1);
		return TC_ACT_SHOT;
	}
	__sync_fetch_and_add(&node->used_bytes, (__s64)len);
	if (ingress->lossless)
		charge_ingress(ingress, node, len);
	mark_congestion(queue, ip, account_enqueue(queue, len, 1));

	/* As ip_decrease_ttl(): the checksum grows by 0x0100, and is never 0xffff (RFC 1624). */
	{
		__u32 check = bpf_ntohs(ip->check) + 0x0100;

		ip->check = bpf_htons(check + (check >= 0xffff));
		ip->ttl--;
	}
	__builtin_memcpy(eth->h_dest, egress_port->peer_mac, 6);
	eth->h_source[0] = 2;
	eth->h_source[1] = 0;
	eth->h_source[2] = egress_id >> 8;
	eth->h_source[3] = egress_id;
	eth->h_source[4] = id >> 8;
	eth->h_source[5] = id;
	choose_transmit_queue(skb, priority);
	return bpf_redirect(config.ifindex_base + egress_id, 0);

no_route:
	node = node_of(port->node);
	if (node)
		__sync_fetch_and_add(&node->no_route_packets, 1);
	return TC_ACT_OK;
}

/* The row of a queue pair of the kernel's that a frame is for, -1 if it has none. */
static __always_inline __s32 kernel_qp_of(__u32 port, const struct iphdr *ip, const void *end)
{
	const struct udphdr *udp = (const void *)(ip + 1);
	const struct bth *bth = (const void *)(udp + 1);
	struct tb_kernel_qp_key key = {};
	__u32 *row;

	if ((const void *)(bth + 1) > end || ip->protocol != IPPROTO_UDP || ip->ihl != 5 ||
	    udp->dest != bpf_htons(TB_ROCE_PORT) || (ip->frag_off & bpf_htons(0x3fff)))
		return -1;
	key.port = port;
	key.dst_address = bpf_ntohl(ip->daddr);
	key.qpn = bpf_ntohl(bth->dest_qp) & 0xffffff;
	row = bpf_map_lookup_elem(&tb_kernel_qps, &key);
	return row ? *row : -1;
}

int tb_write_notification(struct __sk_buff *skb);

SEC("tc")
int host_egress(struct __sk_buff *skb)
{
	/* What the kernel still has to cut (TCP, UDP_SEGMENT) is counted as the frames that will leave. */
	__u32 len = skb->wire_len, packets = skb->gso_segs ?: 1, priority, id = skb->ifindex - config.ifindex_base;
	struct tb_queue *queue;
	struct tb_port *port;
	struct ethhdr *eth;
	struct iphdr *ip;
	void *data, *end;

	if (skb->mark == TB_MARK_NOTIFY) {
		if (!tb_write_notification(skb))
			return TC_ACT_SHOT;
		len = TB_CNP_LEN; /* wire_len is still the copy's */
	}
	if (pull(skb, TB_HEADERS_LEN + 16) < 0 && pull(skb, TB_ETH_HLEN + TB_IP_HLEN) < 0)
		return TC_ACT_OK;
	data = packet_data(skb);
	end = packet_data_end(skb);
	eth = data;
	ip = data + TB_ETH_HLEN;
	if ((void *)(ip + 1) > end || !is_carried(skb, eth))
		return TC_ACT_OK;
	priority = priority_of(ip);
	queue = queue_of(id, priority);
	if (queue)
		account_enqueue(queue, len, packets);
	choose_transmit_queue(skb, priority);
	port = port_of(id);
	if (port && port->flags & TB_PORT_KERNEL_QPS) {
		__s32 row = kernel_qp_of(id, ip, end);

		if (row >= 0)
			skb->priority = TB_QP_CLASS(row);
	}
	/* Steering reads the hash and has one CPU to choose from: any value spares the flow dissector. */
	bpf_set_hash(skb, 1);
	return TC_ACT_OK;
}

struct answer_frame {
	struct ethhdr eth;
	struct iphdr ip;
	struct udphdr udp;
	struct bth bth;
	__be32 words[6]; /* AETH of an ACK, and what came out of order; sixteen zero bytes of a CNP */
	__u32 spare;
} __attribute__((packed));

/* Both ends of a data packet that is to be answered. */
struct answered {
	__be32 local;
	__be32 remote;
	__u8 mac[6];
};

static __always_inline void note_answered(struct answered *to, const struct ethhdr *eth, const struct iphdr *ip)
{
	to->local = ip->daddr;
	to->remote = ip->saddr;
	__builtin_memcpy(to->mac, eth->h_dest, 6);
}

/* What an ACK says of packets beyond the acknowledged ones: bit i of low is packet `first` + i, of high `first` + 64 + i. */
struct sack_block {
	__u64 first;
	__u64 low;
	__u64 high;
};

/* Turn the very packet into an answer of `len` bytes; returns 0 if that fails. */
static __always_inline int write_answer(struct __sk_buff *skb, const struct answered *to, const struct tb_qp *qp,
					__u8 opcode, __u8 becn, __u32 psn, __u32 aeth, const struct sack_block *block,
					const __u32 len)
{
	struct answer_frame *frame;
	struct tb_port *port = port_of(skb->ifindex - config.ifindex_base);
	__u32 crc = 0xffffffff, sum;
	__u8 *covered;
	int i;

	if (!port || bpf_skb_change_tail(skb, len, 0) < 0 || pull(skb, len) < 0)
		return 0;
	frame = packet_data(skb);
	if ((void *)frame + len > packet_data_end(skb))
		return 0;
	/* The leaf is the next hop: its MAC is that of this port's peer; ours says "from a host". */
	__builtin_memcpy(frame->eth.h_dest, port->peer_mac, 6);
	__builtin_memcpy(frame->eth.h_source, to->mac, 6);
	frame->ip.tos = 48 << 2;
	frame->ip.tot_len = bpf_htons(len - TB_ETH_HLEN);
	frame->ip.id = 0;
	frame->ip.frag_off = bpf_htons(0x4000);
	frame->ip.ttl = 64;
	frame->ip.protocol = IPPROTO_UDP;
	frame->ip.saddr = to->local;
	frame->ip.daddr = to->remote;
	sum = 0x4500 + (48 << 2) + (len - TB_ETH_HLEN) + 0x4000 + (64 << 8 | IPPROTO_UDP);
	sum += (bpf_ntohl(to->remote) >> 16) + (bpf_ntohl(to->remote) & 0xffff);
	sum += (bpf_ntohl(to->local) >> 16) + (bpf_ntohl(to->local) & 0xffff);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	frame->ip.check = bpf_htons(~sum);
	frame->udp.source = bpf_htons(qp->udp_source_port);
	frame->udp.dest = bpf_htons(TB_ROCE_PORT);
	frame->udp.len = bpf_htons(len - TB_ETH_HLEN - TB_IP_HLEN);
	frame->udp.check = 0;
	frame->bth.opcode = opcode;
	frame->bth.flags = 0x40; /* MigReq, as Linux sends it */
	frame->bth.pkey = 0xffff;
	frame->bth.dest_qp = bpf_htonl((__u32)becn << 30 | (qp->peer_qpn & 0xffffff));
	frame->bth.psn = bpf_htonl(psn & 0xffffff);
	frame->words[0] = bpf_htonl(aeth);
	if (len == TB_CNP_LEN)
		frame->words[1] = frame->words[2] = frame->words[3] = 0;
	if (len == TB_SACK_LEN && block) {
		__u32 first = (qp->initial_rx_psn + (__u32)block->first) & 0xffffff;

		frame->words[1] = bpf_htonl((__u32)TB_SACK_TYPE << 24 | first);
		frame->words[2] = bpf_htonl(block->low >> 32);
		frame->words[3] = bpf_htonl((__u32)block->low);
		frame->words[4] = bpf_htonl(block->high >> 32);
		frame->words[5] = bpf_htonl((__u32)block->high);
	}

	/* ICRC: eight bytes of ones, then the headers with the variant fields as ones. */
	covered = (__u8 *)&frame->ip;
	for (i = 0; i < 8; i++)
		crc = crc_byte(crc, 0xff);
#pragma unroll
	for (i = 0; i < len - TB_ETH_HLEN - TB_ICRC_LEN; i++) {
		__u8 byte = covered[i];

		if (i == 1 || i == 8 || i == 10 || i == 11 || i == 26 || i == 27 || i == 32)
			byte = 0xff; /* TOS, TTL, IP checksum, UDP checksum, BTH resv8a */
		crc = crc_byte(crc, byte);
	}
	crc = ~crc; /* little-endian on the wire */
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
	crc = __builtin_bswap32(crc);
#endif
	__builtin_memcpy((void *)frame + len - TB_ICRC_LEN, &crc, TB_ICRC_LEN);
	return 1;
}

/* Answer with an ACK or a NAK. */
static __always_inline int answer(struct __sk_buff *skb, const struct answered *to, const struct tb_qp *qp, __u32 psn,
				  __u8 syndrome)
{
	__u32 aeth = (__u32)syndrome << 24 | (__u32)(qp->rx_messages & 0xffffff);

	if (!write_answer(skb, to, qp, 0x11, 0, psn, aeth, NULL, TB_ACK_LEN))
		return TC_ACT_SHOT;
	return bpf_redirect(skb->ifindex, 0); /* through host_egress, which accounts it */
}

/* The notification point: at most one CNP per QP and interval. The frame is overwritten; an ACK may follow. */
static __always_inline void notify(struct __sk_buff *skb, const struct answered *to, struct tb_qp *qp)
{
	__u64 now;

	qp->ce_packets++;
	if (!qp->cnp_interval_ns)
		return;
	now = bpf_ktime_get_ns();
	if (now - qp->cnp_sent_ns < qp->cnp_interval_ns)
		return;
	qp->cnp_sent_ns = now;
	if (!write_answer(skb, to, qp, 0x81, 1, 0, 0, NULL, TB_CNP_LEN))
		return;
	qp->sent_cnps_packets++;
	bpf_clone_redirect(skb, skb->ifindex, 0);
}

/* The frame, about to reach a queue pair of the kernel's: count what DCQCN goes by, and let a copy become the CNP where one is due.
 * Returns nonzero for a CNP, which is the reaction point's: rxe knows none. A function to the verifier, as tb_account_dequeue() is.
 */
__attribute__((noinline)) int tb_observe_kernel_qp(struct __sk_buff *skb)
{
	struct iphdr *ip = packet_data(skb) + TB_ETH_HLEN;
	void *end = packet_data_end(skb);
	__u32 row, overhead;
	struct tb_qp *qp;
	struct bth *bth;
	__u64 now;

	if ((void *)(ip + 1) > end)
		return 0;
	row = kernel_qp_of(skb->ifindex - config.ifindex_base, ip, end);
	bth = (void *)ip + TB_IP_HLEN + TB_UDP_HLEN;
	if ((void *)(bth + 1) > end)
		return 0;
	qp = bpf_map_lookup_elem(&tb_qps, &row);
	if (bth->opcode == 0x81) {
		if (qp)
			qp->cnps_packets++;
		return 1;
	}
	if (!qp || bth->opcode < 0x06 || bth->opcode > 0x0b) /* RDMA WRITE, with or without immediate data */
		return 0;
	overhead = TB_HEADERS_LEN - TB_ETH_HLEN + TB_ICRC_LEN + ((bth->flags >> 4) & 3);
	if (bth->opcode == 0x06 || bth->opcode >= 0x0a)
		overhead += 16;
	if (bth->opcode == 0x09 || bth->opcode == 0x0b)
		overhead += 4;
	if (bpf_ntohs(ip->tot_len) < overhead)
		return 0;
	qp->rx_packets++;
	qp->rx_payload_bytes += bpf_ntohs(ip->tot_len) - overhead;
	if ((ip->tos & 3) != 3)
		return 0;
	qp->ce_packets++;
	now = bpf_ktime_get_ns();
	if (!qp->cnp_interval_ns || now - qp->cnp_sent_ns < qp->cnp_interval_ns)
		return 0;
	qp->cnp_sent_ns = now;
	qp->sent_cnps_packets++;
	skb->mark = TB_MARK_NOTIFY;
	bpf_clone_redirect(skb, skb->ifindex, 0);
	skb->mark = 0;
	return 0;
}

/* The copy of a marked frame becomes the CNP that answers it; returns 0 if that fails. */
__attribute__((noinline)) int tb_write_notification(struct __sk_buff *skb)
{
	struct ethhdr *eth = packet_data(skb);
	struct iphdr *ip = (void *)(eth + 1);
	void *end = packet_data_end(skb);
	struct answered to;
	struct tb_qp *qp;
	__u32 row;

	if ((void *)(ip + 1) > end)
		return 0;
	row = kernel_qp_of(skb->ifindex - config.ifindex_base, ip, end);
	qp = bpf_map_lookup_elem(&tb_qps, &row);
	if (!qp)
		return 0;
	note_answered(&to, eth, ip);
	skb->mark = 0;
	return write_answer(skb, &to, qp, 0x81, 1, 0, 0, NULL, TB_CNP_LEN);
}

static __always_inline int respond(struct __sk_buff *skb, struct tb_qp *qp, const struct answered *to, __u8 opcode,
				   __u32 psn_word, __u32 payload_bytes)
{
	__u32 psn = psn_word & 0xffffff;
	__u32 ahead = (psn - (qp->initial_rx_psn + (__u32)qp->rx_packets)) & 0xffffff;

	if (ahead == 0) {
		qp->rx_packets++;
		qp->rx_payload_bytes += payload_bytes;
		if (opcode == 0x08 || opcode == 0x0a) { /* WRITE LAST, ONLY */
			qp->rx_messages++;
			qp->last_message_ns = bpf_ktime_get_ns();
		}
		if (!(psn_word & 0x80000000))
			return TC_ACT_SHOT; /* consumed */
		qp->sent_acks_packets++;
		return answer(skb, to, qp, psn, 0x1f);
	}
	if (ahead < 0x800000) {
		__u64 highest = qp->rx_highest;

		qp->rx_highest = qp->rx_packets + ahead + 1;
		qp->out_of_order_packets++;
		/* One NAK per gap; another when the requester has gone back, and what it was to send again is missing again. */
		if (qp->nak_armed_at == qp->rx_packets + 1 && qp->rx_highest > highest)
			return TC_ACT_SHOT;
		qp->nak_armed_at = qp->rx_packets + 1;
		qp->sent_naks_packets++;
		return answer(skb, to, qp, qp->initial_rx_psn + (__u32)qp->rx_packets, 0x60);
	}
	qp->duplicate_packets++;
	if (!(psn_word & 0x80000000) || !qp->rx_packets)
		return TC_ACT_SHOT;
	/* A duplicate that asks is told the latest: the ACK before may have been lost. */
	qp->nak_armed_at = 0;
	qp->sent_acks_packets++;
	return answer(skb, to, qp, qp->initial_rx_psn + (__u32)qp->rx_packets - 1, 0x1f);
}

#include "selective.h"

static __always_inline void acknowledge(struct tb_qp *qp, const struct bth *bth, __u32 aeth)
{
	__u32 psn = bpf_ntohl(bth->psn) & 0xffffff;
	__u32 expected = qp->initial_tx_psn + (__u32)qp->acked_packets;
	__u32 ahead;

	if ((aeth >> 24) == 0x60) { /* NAK, PSN sequence error: everything before psn arrived */
		ahead = (psn - expected) & 0xffffff;
		if (ahead >= 0x800000)
			return;
		qp->acked_packets += ahead;
		qp->nak_position = qp->acked_packets;
		__sync_fetch_and_add(&qp->naks_packets, 1);
		return;
	}
	if (aeth >> 29)
		return; /* a NAK of another kind, which only a peer that is not ours sends: nothing is acknowledged */
	ahead = (psn + 1 - expected) & 0xffffff;
	if (ahead < 0x800000)
		qp->acked_packets += ahead;
}

/* A CTS frame: the receiver of our data wrote an entry into the FIFO of grants. Grants count up for ever and an entry
 * stands for all before it, so that one makes up for another that was lost; the PSN is not looked at, nothing is answered.
 * Returns 0 for what is data.
 */
static __always_inline int receive_grant(struct __sk_buff *skb, struct tb_qp *qp)
{
	__u32 rkey;
	__u64 index;
	void *data;

	if (pull(skb, TB_CTS_LEN) < 0)
		return 0;
	data = packet_data(skb);
	if (data + TB_CTS_LEN > packet_data_end(skb))
		return 0;
	__builtin_memcpy(&rkey, data + TB_HEADERS_LEN + 8, sizeof(rkey));
	if (rkey != bpf_htonl(TB_CTS_RKEY))
		return 0;
	__builtin_memcpy(&index, data + TB_CTS_INDEX_OFFSET, sizeof(index)); /* little-endian */
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
	index = __builtin_bswap64(index);
#endif
	qp->cts_packets++;
	if (index > qp->grants)
		qp->grants = index;
	return 1;
}

/* RoCE for a queue pair that is not ours: the kernel's, in this namespace or behind the NIC's attachment. */
static __always_inline int leave_to_kernel(const struct __sk_buff *skb, const struct tb_port *port)
{
	return port->flags & TB_PORT_ATTACHED ? bpf_redirect(skb->ifindex + TB_ATTACHMENT, 0) : TC_ACT_OK;
}

SEC("tc")
int host_ingress(struct __sk_buff *skb)
{
	__u32 len = skb->len, key;
	struct tb_port *port;
	struct udphdr *udp;
	struct tb_qp *qp;
	struct ethhdr *eth;
	struct iphdr *ip;
	struct bth *bth;
	void *data, *end;

	if (pull(skb, TB_HEADERS_LEN + TB_AETH_LEN) < 0 && pull(skb, TB_ETH_HLEN + TB_IP_HLEN) < 0)
		return TC_ACT_OK;
	data = packet_data(skb);
	end = packet_data_end(skb);
	eth = data;
	ip = data + TB_ETH_HLEN;
	if ((void *)(ip + 1) > end)
		return TC_ACT_OK;
	port = port_of(skb->ifindex - config.ifindex_base);
	if (!port)
		return TC_ACT_OK;
	if (!is_carried(skb, eth))
		return tb_receive_other(skb);
	if (tb_account_dequeue(skb->ifindex - config.ifindex_base, MAC_INGRESS(eth->h_source), priority_of(ip), len))
		return TC_ACT_SHOT;

	udp = (void *)(ip + 1);
	bth = (void *)(udp + 1);
	if (ip->protocol != IPPROTO_UDP || (void *)(bth + 1) + TB_AETH_LEN > end || ip->ihl != 5 ||
	    udp->dest != bpf_htons(TB_ROCE_PORT) || (ip->frag_off & bpf_htons(0x3fff)))
		return TC_ACT_OK;
	if (port->flags & TB_PORT_KERNEL_QPS) {
		if (tb_observe_kernel_qp(skb))
			return TC_ACT_SHOT;
		data = packet_data(skb);
		if (data + TB_HEADERS_LEN + TB_AETH_LEN > packet_data_end(skb))
			return TC_ACT_OK;
		eth = data;
		ip = data + TB_ETH_HLEN;
		bth = data + TB_ETH_HLEN + TB_IP_HLEN + TB_UDP_HLEN;
	}
	key = (bpf_ntohl(bth->dest_qp) & 0xffffff) - config.qpn_base;
	if (key >= config.qps)
		return leave_to_kernel(skb, port);
	qp = bpf_map_lookup_elem(&tb_qps, &key);
	if (!qp || !qp->active || qp->port != skb->ifindex - config.ifindex_base)
		return leave_to_kernel(skb, port);

	if (bth->opcode == 0x0a && len == TB_CTS_LEN) {
		if (receive_grant(skb, qp))
			return TC_ACT_SHOT;
		data = packet_data(skb);
		if (data + TB_HEADERS_LEN + TB_AETH_LEN > packet_data_end(skb))
			return TC_ACT_OK;
		eth = data;
		ip = data + TB_ETH_HLEN;
		bth = data + TB_ETH_HLEN + TB_IP_HLEN + TB_UDP_HLEN;
	}
	switch (bth->opcode) {
	case 0x06 ... 0x08: /* WRITE FIRST, MIDDLE, LAST */
	case 0x0a: {        /* WRITE ONLY */
		__u32 overhead = TB_HEADERS_LEN + TB_ICRC_LEN + ((bth->flags >> 4) & 3) +
				 (bth->opcode == 0x06 || bth->opcode == 0x0a ? 16 : 0);
		__u32 frame = TB_ETH_HLEN + bpf_ntohs(ip->tot_len), psn_word = bpf_ntohl(bth->psn);
		__u8 opcode = bth->opcode;
		struct answered to;

		if (frame > len || frame < overhead)
			return TC_ACT_SHOT; /* truncated */
		note_answered(&to, eth, ip);
		if ((ip->tos & 3) == 3)
			notify(skb, &to, qp);
		if (qp->selective)
			return respond_selective(skb, qp, key, &to, opcode, psn_word, frame - overhead);
		return respond(skb, qp, &to, opcode, psn_word, frame - overhead);
	}
	case 0x81:
		qp->cnps_packets++;
		return TC_ACT_SHOT;
	case 0x11:
		if (qp->selective)
			return acknowledge_selective(skb, qp, key);
		acknowledge(qp, bth, bpf_ntohl(*(__be32 *)(bth + 1)));
		return TC_ACT_SHOT;
	default:
		return TC_ACT_OK;
	}
}

/* Of what leaves a soft-RoCE device outside the host's namespace RoCE alone enters the fabric: that namespace announces itself on
 * every interface (mDNS, DHCP, IGMP).
 */
SEC("tc")
int attachment_ingress(struct __sk_buff *skb)
{
	struct udphdr *udp;
	struct ethhdr *eth;
	struct iphdr *ip;

	if (pull(skb, TB_HEADERS_LEN) < 0)
		return TC_ACT_SHOT;
	eth = packet_data(skb);
	ip = (void *)(eth + 1);
	udp = (void *)(ip + 1);
	if ((void *)(udp + 1) > packet_data_end(skb) || !is_carried(skb, eth) || ip->protocol != IPPROTO_UDP || ip->ihl != 5 ||
	    udp->dest != bpf_htons(TB_ROCE_PORT))
		return TC_ACT_SHOT;
	return bpf_redirect(skb->ifindex - TB_ATTACHMENT, 0);
}

/* The fidelity probe: how long a frame waits for this CPU. What the kernel itself sends there, IPv6's solicitations and reports for
 * some seconds after the link came up, is none.
 */
SEC("tc")
int probe_ingress(struct __sk_buff *skb)
{
	__u32 key = 0;
	__u64 *slot;

	if (skb->protocol != bpf_htons(ETH_P_802_EX1))
		return TC_ACT_SHOT;
	slot = bpf_map_lookup_elem(&tb_probe, &key);
	if (slot)
		*slot = bpf_ktime_get_ns();
	key = 1;
	slot = bpf_map_lookup_elem(&tb_probe, &key);
	if (slot)
		*slot = *slot + 1;
	return TC_ACT_SHOT;
}
