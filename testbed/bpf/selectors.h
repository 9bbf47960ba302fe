/* SPDX-License-Identifier: GPL-2.0-only */
/* Which port a packet leaves a switch by: the exact-match entries first, then the group's selector.
 *
 * Each selector has its Python twin in testbed/routing/selectors.py; a test holds the two equal on 10^5 headers. What a
 * selector remembers is in maps of its own, so that the twin can be given the same state.
 *
 * Included by fabric.bpf.c, behind its maps and helpers.
 */
#ifndef TESTBED_SELECTORS_H
#define TESTBED_SELECTORS_H

TB_ARRAY(tb_group_states, struct tb_group_state); /* [group] */
TB_ARRAY(tb_flowlets, struct tb_flowlet);         /* [hash of flow and group] */

/* A hash map, for its keys are sparse; the loader writes it by system call. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct tb_override_key);
	__type(value, __u32); /* egress port id */
} tb_overrides SEC(".maps");

struct flow_words {
	__u32 ports;
	__u32 dest_qp;
	__u32 entropy; /* what an exact-match entry tells flows between two NICs apart by */
};

static __always_inline void read_flow(struct flow_words *flow, const struct iphdr *ip, const void *end, __u32 fields)
{
	const struct udphdr *l4 = (const void *)(ip + 1);

	if (ip->protocol != IPPROTO_UDP && ip->protocol != IPPROTO_TCP)
		return;
	if ((const void *)(l4 + 1) > end || (ip->frag_off & bpf_htons(0x3fff)))
		return;
	flow->ports = (fields & 8 ? (__u32)bpf_ntohs(l4->source) << 16 : 0) | (fields & 16 ? bpf_ntohs(l4->dest) : 0);
	flow->entropy = bpf_ntohs(l4->source);
	if (ip->protocol == IPPROTO_UDP && l4->dest == bpf_htons(TB_ROCE_PORT)) {
		const struct bth *bth = (const void *)(l4 + 1);

		if ((const void *)(bth + 1) <= end) {
			__u32 dest_qp = bpf_ntohl(bth->dest_qp) & 0xffffff;

			flow->dest_qp = fields & 32 ? dest_qp : 0;
			if (dest_qp)
				flow->entropy = dest_qp;
		}
	}
}

/* The hashes of the four words that a switch reads of a flow, bytes as they are on the wire. `rest` is the protocol, then the QP.
 * Functions to the verifier, which thus goes through their bytes once.
 */
__attribute__((noinline)) __u32 tb_hash_murmur3(__u32 seed, __u32 src, __u32 dst, __u32 ports, __u32 rest)
{
	__u32 hash = mix(seed + 0x9e3779b9);

	hash = mix(hash ^ src);
	hash = mix(hash ^ dst);
	hash = mix(hash ^ ports);
	hash = mix(hash ^ rest >> 24);
	return mix(hash ^ (rest & 0xffffff));
}

/* CRC-32 of IEEE 802.3, reflected, from the seed on. */
__attribute__((noinline)) __u32 tb_hash_crc32(__u32 seed, __u32 src, __u32 dst, __u32 ports, __u32 rest)
{
	__u32 words[] = {src, dst, ports, rest}, crc = seed, i;

#pragma unroll
	for (i = 0; i < 16; i++)
		crc = crc_byte(crc, words[i / 4] >> (24 - 8 * (i % 4)));
	return crc;
}

/* CRC-16 of ITU-T V.41 (polynomial 0x1021), from the folded seed on, in the upper half of the word. */
__attribute__((noinline)) __u32 tb_hash_crc16(__u32 seed, __u32 src, __u32 dst, __u32 ports, __u32 rest)
{
	__u32 words[] = {src, dst, ports, rest}, crc = (seed ^ seed >> 16) & 0xffff, i;

#pragma unroll
	for (i = 0; i < 16; i++) {
		__u32 x = (crc >> 8 ^ words[i / 4] >> (24 - 8 * (i % 4))) & 0xff;

		x ^= x >> 4;
		crc = (crc << 8 ^ x << 12 ^ x << 5 ^ x) & 0xffff;
	}
	return crc << 16;
}

static __always_inline __u32 hash_flow(const struct flow_words *flow, const struct iphdr *ip,
				       const struct tb_group *group)
{
	__u32 fields = group->hash_fields;
	__u32 src = fields & 1 ? bpf_ntohl(ip->saddr) : 0;
	__u32 dst = fields & 2 ? bpf_ntohl(ip->daddr) : 0;
	__u32 rest = (fields & 4 ? (__u32)ip->protocol << 24 : 0) | flow->dest_qp;

	switch (group->hash_function) {
	case TB_HASH_CRC32:
		return tb_hash_crc32(group->seed, src, dst, flow->ports, rest);
	case TB_HASH_CRC16:
		return tb_hash_crc16(group->seed, src, dst, flow->ports, rest);
	default:
		return tb_hash_murmur3(group->seed, src, dst, flow->ports, rest);
	}
}

static __always_inline __u32 scale(__u32 word, __u32 members)
{
	return ((__u64)word * members) >> 32;
}

/* How many packets the group has had; on several CPUs each packet still gets a number of its own. */
static __always_inline __u64 take_turn(__u32 group_index)
{
	struct tb_group_state *state = bpf_map_lookup_elem(&tb_group_states, &group_index);

	return state ? __sync_fetch_and_add(&state->turn, 1) : 0;
}

/* The live member of a group with the shortest queue for its weight; the search begins at another member every time, so that
 * equals are taken in turn, and one that stands there several times as often. If none is live, the one it began at.
 *
 * Whatever the loop carries from one round to the next is unknown to the verifier from the outset (`zero` is read from a
 * map) and changes without a branch of its own: rounds then look alike to it, or it would follow every history of them. It is a
 * function to the verifier, which thus goes through the rounds once, not once for every way that leads here.
 */
__attribute__((noinline)) __u32 tb_select_least_depth(__u32 group_index, __u32 priority)
{
	struct tb_group *group = bpf_map_lookup_elem(&tb_groups, &group_index);
	struct tb_group_state *state = bpf_map_lookup_elem(&tb_group_states, &group_index);
	__u32 members, first, best, i;
	__u64 best_depth, best_weight;

	if (!group || !state || !group->members)
		return 0;
	members = group->members;
	first = best = __sync_fetch_and_add(&state->turn, 1) % members;
	best_depth = best_weight = state->zero;
	for (i = 0; i < TB_MAX_CHOICES; i++) {
		__u32 at, key, *member;
		struct tb_queue *queue;
		struct tb_port *port;
		__u64 weight;
		__s64 depth;

		if (i >= members)
			break;
		at = (first + i) % members;
		key = group->first_member + at;
		member = bpf_map_lookup_elem(&tb_members, &key);
		if (!member)
			break;
		port = port_of(TB_MEMBER_PORT(*member));
		queue = queue_of(TB_MEMBER_PORT(*member), priority);
		if (!port || !queue)
			break;
		if (port->flags & TB_PORT_DOWN)
			continue;
		depth = queue->deq_bytes;
		depth = (__s64)queue->enq_bytes - depth;
		depth &= ~(depth >> 63); /* another CPU may have counted in between: never below 0 */
		weight = TB_MEMBER_WEIGHT(*member);
		if (!best_weight || depth * best_weight < best_depth * weight) {
			best = at;
			best_depth = depth;
			best_weight = weight;
		}
	}
	return best;
}

/* The hash of a flow, changed every time the flow has paused for longer than the gap. Flows that share a row of the table
 * are one flow here, as in a switch.
 */
static __always_inline __u32 flowlet_hash(const struct tb_group *group, __u32 group_index, __u32 hash)
{
	__u32 key = mix(hash ^ group_index) & (TB_FLOWLETS - 1);
	struct tb_flowlet *flowlet = bpf_map_lookup_elem(&tb_flowlets, &key);
	__u64 now = bpf_ktime_get_ns();

	if (!flowlet)
		return hash;
	if (flowlet->last_ns && now - flowlet->last_ns > group->gap_ns)
		flowlet->number++;
	flowlet->last_ns = now;
	return flowlet->number ? mix(hash ^ mix(flowlet->number)) : hash;
}

/* Return the egress port id, 0 for none. */
static __always_inline __u32 select_egress(const struct tb_group *group, __u32 group_index, __u32 node,
					   const struct iphdr *ip, const void *end, __u32 priority)
{
	__u32 key = group->first_member, *member;
	struct flow_words flow = {};

	if (group->members > 1 || group->overrides)
		read_flow(&flow, ip, end, group->hash_fields);
	if (group->overrides) {
		struct tb_override_key exact = {
			.node = node,
			.src_address = bpf_ntohl(ip->saddr),
			.dst_address = bpf_ntohl(ip->daddr),
			.flow = flow.entropy,
		};

		member = bpf_map_lookup_elem(&tb_overrides, &exact);
		if (member)
			return *member;
	}
	if (group->members > 1) {
		switch (group->selector) {
		case TB_SELECT_ROUND_ROBIN:
			key += take_turn(group_index) % group->members;
			break;
		case TB_SELECT_RANDOM: /* a generator whose state is the turn, so that runs and tests repeat */
			key += scale(mix(mix((__u32)take_turn(group_index)) ^ mix(group->seed + 0x9e3779b9)),
				     group->members);
			break;
		case TB_SELECT_LEAST_DEPTH:
			key += tb_select_least_depth(group_index, priority);
			break;
		case TB_SELECT_FLOWLET:
			key += scale(flowlet_hash(group, group_index, hash_flow(&flow, ip, group)), group->members);
			break;
		default:
			key += scale(hash_flow(&flow, ip, group), group->members);
		}
	}
	member = bpf_map_lookup_elem(&tb_members, &key);
	return member ? TB_MEMBER_PORT(*member) : 0;
}

#endif
